"""One thin module for each CommandLineTool of the workflow."""
