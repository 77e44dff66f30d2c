"""An audit: what a batch has made is judged and timed again."""
