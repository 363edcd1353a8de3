"""From documents to tokens: reading, drawing, and packing calibration text."""
