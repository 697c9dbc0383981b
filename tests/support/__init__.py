"""What the tests share, apart from their fixtures."""
