// What the bindings of all ops share: raw addresses and sizes come in, and a thread count or a CUDA stream; no torch,
// no checks of user input.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

namespace py = pybind11;

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_cuda(py::module_& m);
void bind_farthest_point_sample(py::module_& m);
void bind_fourier_features(py::module_& m);
void bind_gating(py::module_& m);
void bind_inr_mixture(py::module_& m);
void bind_knn(py::module_& m);
void bind_linear(py::module_& m);
void bind_planar_flow(py::module_& m);
void bind_point_conv(py::module_& m);
