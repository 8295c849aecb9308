"""Speed, side by side with what others do, on the same work in the same run."""
