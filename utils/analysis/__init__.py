"""What reads finished runs. Training imports nothing from here."""
