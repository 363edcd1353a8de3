"""What a conversion and its cache would take, before anything is done."""
