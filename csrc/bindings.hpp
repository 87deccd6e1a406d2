// Common header of the binding files: turns a result of C++ into an array that owns its memory.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <initializer_list>
#include <utility>

#include "buffer.hpp"

namespace usf {

namespace nb = nanobind;

// A Python object that frees `data` when nothing refers to it any more.
template <class T>
nb::capsule to_owner(Memory<T> data) {
    return nb::capsule(new Memory<T>(std::move(data)),
                       [](void* p) noexcept { delete static_cast<Memory<T>*>(p); });
}

// Hands `data` to Python as a NumPy array of `shape`; the array frees it.
template <class T>
nb::ndarray<nb::numpy, T> to_numpy(Memory<T> data, std::initializer_list<std::size_t> shape) {
    T* values = data.get();
    return nb::ndarray<nb::numpy, T>(values, shape, to_owner(std::move(data)));
}

void bind_component_tree(nb::module_& m);
void bind_nfa(nb::module_& m);
void bind_stage_run(nb::module_& m);
void bind_convolutions(nb::module_& m);
void bind_rows(nb::module_& m);
void bind_ops(nb::module_& m);

}  // namespace usf
