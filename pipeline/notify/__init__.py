"""Messages about a run: that it has ended, failed, or stands still."""
