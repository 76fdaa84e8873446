// How Python hands over the structs of csrc/cloud.h.
#pragma once

#include "../cloud.h"
#include "binding.h"

template <class T>
struct Passed<const vamoh::Cloud<T>&> : Fields<vamoh::Cloud<T>, const T*, int64_t, int64_t, int64_t> {};

template <>
struct Passed<const vamoh::Mask&> : Fields<vamoh::Mask, const bool*, int64_t> {};

template <class T>
struct Passed<const vamoh::DistanceTable<T>&> : Fields<vamoh::DistanceTable<T>, const T*, int64_t> {};
