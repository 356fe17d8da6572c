"""What everything else stands on: needs torch alone."""
