"""What the tests share: backends under test, memory layouts, problems with their truth, and the accuracy rule."""
