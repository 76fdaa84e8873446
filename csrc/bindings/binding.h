// How a kernel becomes a function of the module: `native(&vamoh::linear)` takes what vamoh::linear takes, for a pointer a
// tensor and for a struct the list of its fields, and lets other Python threads run meanwhile. It includes nothing of
// torch and checks no user input.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>

#include "../isa.h"

namespace py = pybind11;
using namespace py::literals;

// Memory of a tensor, which lives as long as this: made contiguous if it is not. An int is an address, of memory that
// is taken as it lies; None is address 0.
struct __attribute__((visibility("hidden"))) Memory {
  uintptr_t address = 0;
  py::object tensor;
};

namespace pybind11::detail {

template <>
struct type_caster<Memory> {
  PYBIND11_TYPE_CASTER(Memory, const_name("Tensor | int | None"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    if (!PyLong_Check(source.ptr())) {
      if (!hasattr(source, "data_ptr")) return false;
      value.tensor = source.attr("contiguous")();
      source = value.tensor.attr("data_ptr")().release();
      value.address = PyLong_AsUnsignedLongLong(source.ptr());
      source.dec_ref();
    } else {
      value.address = PyLong_AsUnsignedLongLong(source.ptr());
    }
    if (!PyErr_Occurred()) return true;
    throw error_already_set();
  }
};

}  // namespace pybind11::detail

// What comes from Python for an argument of type A, and A made of it.
template <class A>
struct Passed {
  using type = A;
  static A get(A value) { return value; }
};

template <class T>
struct Passed<T*> {
  using type = Memory;
  static T* get(const Memory& memory) { return reinterpret_cast<T*>(memory.address); }
};

template <>
struct Passed<vamoh::Isa> {
  using type = std::string;
  static vamoh::Isa get(const std::string& name) { return vamoh::parse_isa(name); }
};

template <class A>
using passed = typename Passed<A>::type;

// For a struct of these fields: `template <> struct Passed<S> : Fields<S, ...> {};`
template <class S, class... F>
struct Fields {
  using type = std::tuple<passed<F>...>;
  static S get(const type& fields) {
    return std::apply([](const auto&... field) { return S{Passed<F>::get(field)...}; }, fields);
  }
};

template <class... A>
auto native(void (*run)(A...)) {
  return [run](passed<A>... arguments) {
    const py::gil_scoped_release unlocked;
    run(Passed<A>::get(arguments)...);
  };
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
