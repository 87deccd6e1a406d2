// What every binding file shares: how a result of C++ becomes an array that owns its memory.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <initializer_list>
#include <utility>

#include "buffer.hpp"

namespace usf {

namespace nb = nanobind;

// Hands `data` to Python as a NumPy array of `shape`; the array frees it.
template <class T>
nb::ndarray<nb::numpy, T> to_numpy(Memory<T> data, std::initializer_list<std::size_t> shape) {
    auto* held = new Memory<T>(std::move(data));
    nb::capsule owner(held, [](void* p) noexcept { delete static_cast<Memory<T>*>(p); });
    return nb::ndarray<nb::numpy, T>(held->get(), shape, owner);
}

void bind_component_tree(nb::module_& m);
void bind_nfa(nb::module_& m);

}  // namespace usf
