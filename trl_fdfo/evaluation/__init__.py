"""What rewards, control rewards and diversity say of images."""
