"""What happens on the aggregation VM."""
