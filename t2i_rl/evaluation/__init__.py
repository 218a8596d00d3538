"""Measuring: records, statistics, stages, tables."""
