"""What a conversion is saved as, and what each format can hold."""
