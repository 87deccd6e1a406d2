#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include "bindings.hpp"
#include "convolution.hpp"
#include "factor.hpp"
#include "lu_map.hpp"
#include "map_product.hpp"
#include "row_product.hpp"
#include "winograd_gradient.hpp"

namespace usf {

#ifdef USF_PRODUCTS

using Address = std::uintptr_t;
// Images, height and width of maps whose positions are rows.
using Sizes = std::tuple<std::int64_t, std::int64_t, std::int64_t>;

using ProductSizes = std::tuple<std::int64_t, int, int, std::int64_t>;  // images, outputs, inputs, positions
using Matrix = std::tuple<Address, std::int64_t, bool>;                 // data, stride of rows, transposed
using View = std::tuple<Address, std::int64_t, std::int64_t, bool>;     // the fields of MapView
using Rows = std::tuple<Address, std::int64_t>;                         // data, stride of rows

const float* values_at(std::optional<Address> address) {
    return address ? reinterpret_cast<const float*>(*address) : nullptr;
}

Ending ending_of(bool relu, std::optional<Address> mask) {
    return mask ? Ending::masked : relu ? Ending::relu : Ending::plain;
}

Inputs rows_of(const Rows& rows) {
    return {values_at(std::get<0>(rows)), std::get<1>(rows)};
}

MapView view_of(const View& view) {
    const auto [data, image, next, rows] = view;
    return {values_at(data), image, next, rows};
}

MatrixView matrix_of(const Matrix& matrix) {
    const auto [data, stride, transposed] = matrix;
    return {values_at(data), stride, transposed};
}

// Converts -1, 0 or 1 to lower, whole or upper.
Triangle triangle_of(int sign) {
    return sign < 0 ? Triangle::lower : sign > 0 ? Triangle::upper : Triangle::whole;
}

// Parameters of an LU map and an ActNorm in front: channels; lower and upper, with the strides of their rows;
// signs, log_diagonal, log_scale and offset.
using LuMap = std::tuple<int, Rows, Rows, Address, std::optional<Address>, std::optional<Address>,
                         std::optional<Address>>;

LuParameters parameters_of(const LuMap& map) {
    const auto& [channels, lower, upper, signs, log_diagonal, log_scale, offset] = map;
    return {channels,
            values_at(std::get<0>(lower)),
            std::get<1>(lower),
            values_at(std::get<0>(upper)),
            std::get<1>(upper),
            values_at(signs),
            values_at(log_diagonal),
            values_at(log_scale),
            values_at(offset)};
}

float* memory_at(std::optional<Address> address) {
    return address ? reinterpret_cast<float*>(*address) : nullptr;
}

// Tensors are passed as addresses; `usf_kernels.ops.convolution` has checked their shapes.
void bind_convolutions(nb::module_& m) {
    using namespace nb::literals;
    m.attr("FEWEST_CHANNELS") = fewest_channels;
    m.def(
        "convolve",
        [](const Sizes& sizes, const Rows& rows, Address weight, const std::tuple<int, int>& channels,
           const std::tuple<std::int64_t, std::int64_t, std::int64_t>& strides, bool adjoint,
           std::optional<Address> bias, bool relu, std::optional<Address> mask, Address out, int threads) {
            nb::gil_scoped_release unlocked;
            const auto [outputs, inputs] = channels;
            const auto [output, input, tap] = strides;
            const Kernel forward{values_at(weight), outputs, inputs, output, input, tap};
            const Kernel kernel = adjoint ? forward.adjoint() : forward;
            const auto [images, height, width] = sizes;
            const Condition beside{values_at(mask), images, kernel.outputs};
            convolution(kernel, values_at(bias), ending_of(relu, mask), rows_of(rows),
                        Call{{images, height, width}, threads, mask ? &beside : nullptr},
                        reinterpret_cast<float*>(out));
        },
        "sizes"_a, "rows"_a, "weight"_a, "channels"_a, "strides"_a, "adjoint"_a, "bias"_a.none(), "relu"_a,
        "mask"_a.none(), "out"_a, "threads"_a);
    m.def(
        "kernel_gradient",
        [](const Sizes& sizes, const Rows& rows, const Rows& grad, const std::tuple<int, int>& channels,
           Address out, int threads) {
            nb::gil_scoped_release unlocked;
            const auto [outputs, inputs] = channels;
            const auto [images, height, width] = sizes;
            kernel_gradient(rows_of(rows), rows_of(grad), inputs, outputs, {images, height, width}, threads,
                            reinterpret_cast<float*>(out));
        },
        "sizes"_a, "rows"_a, "grad"_a, "channels"_a, "out"_a, "threads"_a);
    m.def(
        "map_product",
        [](const ProductSizes& sizes, const Matrix& matrix, int triangle, const View& x,
           std::optional<Address> bias, bool relu, std::optional<Address> mask, Address out, int threads) {
            nb::gil_scoped_release unlocked;
            const auto [images, outputs, inputs, positions] = sizes;
            map_product(matrix_of(matrix), triangle_of(triangle), outputs, inputs, view_of(x), images,
                        positions, values_at(bias), ending_of(relu, mask), values_at(mask),
                        reinterpret_cast<float*>(out), threads);
        },
        "sizes"_a, "matrix"_a, "triangle"_a, "x"_a, "bias"_a.none(), "relu"_a, "mask"_a.none(), "out"_a,
        "threads"_a);
    m.def(
        "row_product",
        [](const std::tuple<std::int64_t, std::int64_t>& sizes, const Matrix& matrix,
           const std::tuple<int, int>& channels, const Rows& rows, std::optional<Address> bias, bool relu,
           std::optional<Address> mask, std::optional<Address> share, Address out, int threads) {
            nb::gil_scoped_release unlocked;
            const auto [images, positions] = sizes;
            const auto [outputs, inputs] = channels;
            const Condition beside{values_at(mask ? mask : share), mask ? images : 1, outputs};
            row_product(matrix_of(matrix), values_at(bias), outputs, inputs, ending_of(relu, mask),
                        rows_of(rows), Call{{images, positions, 1}, threads, beside.data ? &beside : nullptr},
                        reinterpret_cast<float*>(out));
        },
        "sizes"_a, "matrix"_a, "channels"_a, "rows"_a, "bias"_a.none(), "relu"_a, "mask"_a.none(),
        "share"_a.none(), "out"_a, "threads"_a);
    m.def(
        "outer_product",
        [](const ProductSizes& sizes, const View& a, const View& x, int triangle, Address out, int threads) {
            nb::gil_scoped_release unlocked;
            const auto [images, outputs, inputs, positions] = sizes;
            outer_product({view_of(a), view_of(x), triangle_of(triangle), outputs, inputs}, images, positions,
                          reinterpret_cast<float*>(out), threads);
        },
        "sizes"_a, "a"_a, "x"_a, "triangle"_a, "out"_a, "threads"_a);
    m.def(
        "factor_maps",
        [](const Matrix& matrix, bool upper, std::optional<Address> diagonal, std::optional<Address> bias,
           const std::tuple<std::int64_t, int, std::int64_t>& sizes, const View& x, Address out,
           int threads) {
            nb::gil_scoped_release unlocked;
            const auto [images, channels, positions] = sizes;
            factor_maps({matrix_of(matrix), upper, values_at(diagonal), channels}, values_at(bias),
                        view_of(x), images, positions, reinterpret_cast<float*>(out), threads);
        },
        "matrix"_a, "upper"_a, "diagonal"_a.none(), "bias"_a.none(), "sizes"_a, "x"_a, "out"_a, "threads"_a);
    m.def(
        "factor_rows",
        [](const Matrix& matrix, bool upper, std::optional<Address> diagonal, std::optional<Address> bias,
           int channels, const std::tuple<Address, std::int64_t, std::int64_t>& x, Address out, int threads) {
            nb::gil_scoped_release unlocked;
            const auto [rows, stride, count] = x;
            factor_rows({matrix_of(matrix), upper, values_at(diagonal), channels}, values_at(bias),
                        Inputs{values_at(rows), stride}, count, reinterpret_cast<float*>(out), threads);
        },
        "matrix"_a, "upper"_a, "diagonal"_a.none(), "bias"_a.none(), "channels"_a, "x"_a, "out"_a,
        "threads"_a);
    m.def(
        "lu_map",
        [](const LuMap& map, std::optional<Address> bias, Address matrix, std::optional<Address> moved,
           Address log_det, Address memory, int threads) {
            nb::gil_scoped_release unlocked;
            *memory_at(log_det) = lu_map(parameters_of(map), values_at(bias), memory_at(matrix),
                                         memory_at(moved), memory_at(memory), threads);
        },
        "map"_a, "bias"_a.none(), "matrix"_a, "moved"_a.none(), "log_det"_a, "memory"_a, "threads"_a);
    m.def(
        "lu_map_gradients",
        [](const LuMap& map, Address matrix, Address of_matrix, std::optional<Address> of_moved,
           Address of_log_det, Address lower, Address upper, std::optional<Address> log_diagonal,
           std::optional<Address> log_scale, std::optional<Address> offset, Address memory, int threads) {
            nb::gil_scoped_release unlocked;
            const LuGradients grads{values_at(of_matrix), values_at(of_moved), *values_at(of_log_det),
                                    memory_at(lower),     memory_at(upper),    memory_at(log_diagonal),
                                    memory_at(log_scale), memory_at(offset)};
            lu_map_gradients(parameters_of(map), values_at(matrix), grads, memory_at(memory), threads);
        },
        "map"_a, "matrix"_a, "of_matrix"_a, "of_moved"_a.none(), "of_log_det"_a, "lower"_a, "upper"_a,
        "log_diagonal"_a.none(), "log_scale"_a.none(), "offset"_a.none(), "memory"_a, "threads"_a);
}

#else

void bind_convolutions(nb::module_&) {}

#endif

}  // namespace usf
