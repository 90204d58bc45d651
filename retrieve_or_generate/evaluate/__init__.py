"""What a model is measured by. Every part takes arrays and gives numbers; none of them knows where training images came from."""
