"""What a launch costs the host, measured without a GPU: `ia3rt bench launch`."""
