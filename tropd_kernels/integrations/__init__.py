"""Other trainers. Each module is for one, and imports it only where it is installed."""
