"""Raw rewards become calibrated ones: ranks among the reference policy's own responses."""
