"""What programs call: to enqueue, to look, to cancel and retry, to pause, to prune."""
