"""What the unmodified class can express, measured, and how a config is written."""
