"""Plain Grad-CAM."""

from vpl_baselines.grad_cam.adapter import GradCAM

__all__ = ["GradCAM"]
