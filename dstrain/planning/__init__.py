"""What will run: the layout, the batch arithmetic, the DeepSpeed JSON and the launch, as pure data."""
