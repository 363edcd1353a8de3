"""From a checked request to a finished folder: what to choose, layer after layer, within time and memory."""
