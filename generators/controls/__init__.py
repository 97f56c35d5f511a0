"""Controls of prompts: what is done to a caption while images are drawn, so that each object gets its own attributes.

A control is a file of its own and works with any generator that reads captions; see docs/controls.md.
"""
