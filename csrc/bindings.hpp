// What every binding file shares: how a result of C++ becomes an array that owns its memory.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <initializer_list>
#include <memory>

namespace usf {

namespace nb = nanobind;

// Hands `data` (new T[]) to Python as a NumPy array of `shape`; the array frees it.
template <class T>
nb::ndarray<nb::numpy, T> to_numpy(std::unique_ptr<T[]> data, std::initializer_list<std::size_t> shape) {
    T* raw = data.release();
    nb::capsule owner(raw, [](void* p) noexcept { delete[] static_cast<T*>(p); });
    return nb::ndarray<nb::numpy, T>(raw, shape, owner);
}

void bind_component_tree(nb::module_& m);
void bind_nfa(nb::module_& m);

}  // namespace usf
