"""The operations the model is made of, each with a plain-torch reference and possibly faster implementations."""

from __future__ import annotations

from vamoh.ops._noise import CounterNoise as CounterNoise
from vamoh.ops._status import status as status
from vamoh.ops.farthest_point_sample import farthest_point_sample as farthest_point_sample
from vamoh.ops.fourier_features import fourier_features as fourier_features
from vamoh.ops.gating import categorical_kl as categorical_kl
from vamoh.ops.gating import gating as gating
from vamoh.ops.inr_mixture import inr_mixture as inr_mixture
from vamoh.ops.inr_mixture import inr_mixture_expected_log_likelihood as inr_mixture_expected_log_likelihood
from vamoh.ops.inr_mixture import inr_mixture_log_likelihood as inr_mixture_log_likelihood
from vamoh.ops.inr_mixture import inr_mixture_mean as inr_mixture_mean
from vamoh.ops.knn import knn as knn
from vamoh.ops.linear import linear as linear
from vamoh.ops.planar_flow import planar_flow_expected_log_prob as planar_flow_expected_log_prob
from vamoh.ops.planar_flow import planar_flow_log_prob as planar_flow_log_prob
from vamoh.ops.planar_flow import planar_flow_sample as planar_flow_sample
from vamoh.ops.point_conv import neighbor_difference as neighbor_difference
from vamoh.ops.point_conv import neighbor_mean as neighbor_mean
from vamoh.ops.point_conv import point_conv as point_conv
