"""An edge node: the resident worker that keeps models loaded, and what starts, secures and watches a node."""
