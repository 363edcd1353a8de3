"""What a conversion cost, measured on the files that were written."""
