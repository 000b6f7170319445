"""What every backend must do, op by op."""
