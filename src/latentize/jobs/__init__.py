"""Conversions from checked input to finished folder: what ``latentize.convert`` runs."""

from latentize.jobs.job import Job
from latentize.jobs.latent import LatentJob
from latentize.jobs.lowered import LowerJob
from latentize.jobs.pooled import PooledJob
from latentize.jobs.text import Text, draw_text

__all__ = ["Job", "LatentJob", "LowerJob", "PooledJob", "Text", "draw_text"]
