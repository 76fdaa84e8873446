// How a kernel becomes a function of the module: `native(&vamoh::linear)` takes what vamoh::linear takes, for a pointer
// a tensor and for a struct the list of its fields, and lets other Python threads run meanwhile. It includes nothing of
// torch and checks no user input.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
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

// Memory of a tensor of N dimensions, taken as it lies.
template <size_t N>
struct Strided {
  uintptr_t address = 0;
  std::array<int64_t, N> sizes{}, strides{};
};

// Names of attributes; Python finds one object faster than it makes a string.
#define VAMOH_INTERNED(name) static PyObject* const name = PyUnicode_InternFromString(#name)

inline py::object owned(PyObject* object) {
  if (object == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

inline uintptr_t address(const py::object& number) {
  const auto value = static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(number.ptr()));
  if (PyErr_Occurred()) throw py::error_already_set();
  return value;
}

namespace pybind11::detail {

template <>
struct type_caster<Memory> {
  PYBIND11_TYPE_CASTER(Memory, const_name("Tensor | int | None"));

  bool load(handle source, bool) {
    VAMOH_INTERNED(contiguous);
    VAMOH_INTERNED(data_ptr);
    if (source.is_none()) return true;
    if (PyLong_Check(source.ptr())) {
      value.address = address(reinterpret_borrow<object>(source));
    } else {
      value.tensor = owned(PyObject_CallMethodNoArgs(source.ptr(), contiguous));
      value.address = address(owned(PyObject_CallMethodNoArgs(value.tensor.ptr(), data_ptr)));
    }
    return true;
  }
};

template <size_t N>
struct type_caster<Strided<N>> {
  PYBIND11_TYPE_CASTER(Strided<N>, const_name("Tensor"));

  bool load(handle source, bool) {
    VAMOH_INTERNED(data_ptr);
    VAMOH_INTERNED(shape);
    VAMOH_INTERNED(stride);
    value.address = address(owned(PyObject_CallMethodNoArgs(source.ptr(), data_ptr)));
    const tuple sizes = owned(PyObject_GetAttr(source.ptr(), shape));
    const tuple strides = owned(PyObject_CallMethodNoArgs(source.ptr(), stride));
    if (sizes.size() != N) return false;
    for (size_t i = 0; i < N; ++i) {
      value.sizes[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes.ptr(), i));
      value.strides[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), i));
    }
    return true;
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
