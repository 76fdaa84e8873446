// How Python hands over the structs of csrc/point_conv.h.
#pragma once

#include "../point_conv.h"
#include "binding.h"

template <>
struct Passed<const vamoh::PointConvInputs&>
    : Fields<vamoh::PointConvInputs, const float*, const int64_t*, const float*, const float*, const float*> {};

template <>
struct Passed<const vamoh::PointConvGradients&> : Fields<vamoh::PointConvGradients, float*, float*, float*, float*> {};

template <>
struct Passed<const vamoh::PointConvSizes&>
    : Fields<vamoh::PointConvSizes, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool> {};

template <>
struct Passed<const vamoh::DifferenceSizes&>
    : Fields<vamoh::DifferenceSizes, int64_t, int64_t, int64_t, int64_t, int64_t, bool, bool> {};
