#include <stdexcept>
#include <string>
#include <tuple>

#include "bindings.hpp"
#include "interleave.hpp"
#include "rows.hpp"

namespace usf {

// `Half` checks the indices.
template <class T>
using Rows = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Index = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Numbers = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Throws std::invalid_argument unless values for the rows of a state have this width.
template <class Array>
void check_values(const char* name, const Array& values, const Array& state, std::size_t width) {
    if (values.shape(0) == state.shape(0) && values.shape(1) == width) return;
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(state.shape(0)) + " x " +
                                std::to_string(width) + ", found " + std::to_string(values.shape(0)) + " x " +
                                std::to_string(values.shape(1)));
}

Half half_of(const Index& index, std::size_t channels) {
    return Half(index.data(), static_cast<int>(index.shape(0)), static_cast<int>(channels));
}

// NumPy has no bfloat16: such tensors are passed as their bits.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 2, std::int16_t, float>;

template <class T, class Array>
T* data_of(const Array& array) {
    return reinterpret_cast<T*>(array.data());
}

template <class T>
void bind_value_type(nb::module_& m) {
    using namespace nb::literals;
    using Array = Rows<Bits<T>>;
    m.def(
        "select_rows",
        [](Array state, Index index, Array out, int threads) {
            check_values("out", out, state, index.shape(0));
            nb::gil_scoped_release unlocked;
            select_rows(data_of<T>(state), state.shape(0), half_of(index, state.shape(1)), data_of<T>(out),
                        threads);
        },
        "state"_a.noconvert(), "index"_a.noconvert(), "out"_a.noconvert(), "threads"_a);
    m.def(
        "add_rows",
        [](Array state, Index index, Array values, float factor, int threads) {
            check_values("output of subnet", values, state, index.shape(0));
            nb::gil_scoped_release unlocked;
            add_rows(data_of<T>(state), state.shape(0), half_of(index, state.shape(1)), data_of<T>(values),
                     factor, threads);
        },
        "state"_a.noconvert(), "index"_a.noconvert(), "values"_a.noconvert(), "factor"_a, "threads"_a);
    m.def(
        "affine_rows",
        [](Array state, Index index, Array outputs, Numbers shift, float clamp, bool inverse, Numbers log_det,
           int threads) {
            check_values("output of subnet", outputs, state, 2 * index.shape(0));
            if (shift.shape(0) != index.shape(0) || log_det.shape(0) != state.shape(0))
                throw std::invalid_argument("shift, log_det: expected a value for each channel, each row");
            nb::gil_scoped_release unlocked;
            affine_rows(data_of<T>(state), state.shape(0), half_of(index, state.shape(1)),
                        data_of<T>(outputs), shift.data(), clamp, inverse, log_det.data(), threads);
        },
        "state"_a.noconvert(), "index"_a.noconvert(), "outputs"_a.noconvert(), "shift"_a.noconvert(),
        "clamp"_a, "inverse"_a, "log_det"_a.noconvert(), "threads"_a);
}

template <class From, class To>
void bind_interleave(nb::module_& m) {
    using namespace nb::literals;
    using Maps = nb::ndarray<Bits<From>, nb::ndim<3>, nb::device::cpu>;
    m.def(
        "interleave",
        [](Maps maps, Rows<Bits<To>> rows, int threads) {
            const auto [images, channels, positions] =
                std::tuple(maps.shape(0), maps.shape(1), maps.shape(2));
            const bool lie = (positions <= 1 || maps.stride(2) == 1) &&
                             (channels <= 1 || maps.stride(1) == static_cast<std::int64_t>(positions));
            if (maps.size() > 0 && !lie) throw nb::value_error("one channel's positions behind the other's");
            nb::gil_scoped_release unlocked;
            interleave(data_of<const From>(maps), maps.stride(0), images, channels, positions,
                       data_of<To>(rows), threads);
        },
        "maps"_a.noconvert(), "rows"_a.noconvert(), "threads"_a);
}

void bind_rows(nb::module_& m) {
    bind_value_type<float>(m);
    bind_value_type<BFloat16>(m);
    bind_interleave<float, float>(m);
    bind_interleave<float, BFloat16>(m);
    bind_interleave<BFloat16, BFloat16>(m);
}

}  // namespace usf
