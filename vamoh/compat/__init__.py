"""The published code's formats: its configurations, its checkpoints, its model class."""
