"""Rollouts and updates in `transformers.Trainer`, for any algorithm."""
