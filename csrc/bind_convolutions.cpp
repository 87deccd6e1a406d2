#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include "bindings.hpp"
#include "map_product.hpp"
#include "row_product.hpp"
#include "winograd_gradient.hpp"

namespace usf {

#ifdef USF_PRODUCTS

using Address = std::uintptr_t;
// Images, height and width of maps whose positions are rows.
using Sizes = std::tuple<std::int64_t, std::int64_t, std::int64_t>;

using ProductSizes = std::tuple<std::int64_t, int, int, std::int64_t>;  // images, outputs, inputs, positions
using Matrix = std::tuple<Address, std::int64_t, bool>;        // from one row to the next; transposed or not
using View = std::tuple<Address, std::int64_t, std::int64_t>;  // of maps: image and channel strides

const float* values_at(std::optional<Address> address) {
    return address ? reinterpret_cast<const float*>(*address) : nullptr;
}

Ending ending_of(bool relu, std::optional<Address> mask) {
    return mask ? Ending::masked : relu ? Ending::relu : Ending::plain;
}

MapView view_of(const View& view) {
    const auto [data, image, channel] = view;
    return {values_at(data), image, channel};
}

// Tensors come as addresses, in the shapes that `usf_kernels.ops.convolution` has checked.
void bind_convolutions(nb::module_& m) {
    using namespace nb::literals;
    m.attr("FEWEST_CHANNELS") = Winograd::fewest;
    m.def(
        "convolve",
        [](const Sizes& sizes, Address rows, Address weight, const std::tuple<int, int>& channels,
           const std::tuple<std::int64_t, std::int64_t, std::int64_t>& strides, bool adjoint,
           std::optional<Address> bias, bool relu, std::optional<Address> mask, Address out, int threads) {
            nb::gil_scoped_release unlocked;
            static thread_local auto memory = std::make_shared<Floats>();
            const auto [outputs, inputs] = channels;
            const auto [output, input, tap] = strides;
            const Kernel kernel{values_at(weight), outputs, inputs, output, input, tap};
            const Winograd winograd(adjoint ? kernel.adjoint() : kernel, values_at(bias), threads, memory);
            const auto [images, height, width] = sizes;
            const Condition beside{values_at(mask), images, winograd.outputs()};
            apply(winograd, ending_of(relu, mask), Inputs{values_at(rows), winograd.inputs()},
                  Call{{images, height, width}, threads, mask ? &beside : nullptr},
                  reinterpret_cast<float*>(out));
        },
        "sizes"_a, "rows"_a, "weight"_a, "channels"_a, "strides"_a, "adjoint"_a, "bias"_a.none(), "relu"_a,
        "mask"_a.none(), "out"_a, "threads"_a);
    m.def(
        "kernel_gradient",
        [](const Sizes& sizes, Address rows, Address grad, const std::tuple<int, int>& channels, Address out,
           int threads) {
            nb::gil_scoped_release unlocked;
            const auto [outputs, inputs] = channels;
            const auto [images, height, width] = sizes;
            kernel_gradient(Inputs{values_at(rows), inputs}, Inputs{values_at(grad), outputs}, inputs,
                            outputs, {images, height, width}, threads, reinterpret_cast<float*>(out));
        },
        "sizes"_a, "rows"_a, "grad"_a, "channels"_a, "out"_a, "threads"_a);
    m.def(
        "map_product",
        [](const ProductSizes& sizes, Address matrix, bool transposed, const View& x,
           std::optional<Address> bias, bool relu, std::optional<Address> mask, Address out, int threads) {
            nb::gil_scoped_release unlocked;
            const auto [images, outputs, inputs, positions] = sizes;
            map_product(values_at(matrix), transposed, outputs, inputs, view_of(x), images, positions,
                        values_at(bias), ending_of(relu, mask), values_at(mask),
                        reinterpret_cast<float*>(out), threads);
        },
        "sizes"_a, "matrix"_a, "transposed"_a, "x"_a, "bias"_a.none(), "relu"_a, "mask"_a.none(), "out"_a,
        "threads"_a);
    m.def(
        "row_product",
        [](const std::tuple<std::int64_t, std::int64_t>& sizes, const Matrix& matrix,
           const std::tuple<int, int>& channels, Address rows, std::optional<Address> bias, bool relu,
           std::optional<Address> mask, std::optional<Address> share, Address out, int threads) {
            nb::gil_scoped_release unlocked;
            const auto [images, positions] = sizes;
            const auto [of_matrix, stride, transposed] = matrix;
            const auto [outputs, inputs] = channels;
            const Condition beside{values_at(mask ? mask : share), mask ? images : 1, outputs};
            row_product({values_at(of_matrix), stride, transposed}, values_at(bias), outputs, inputs,
                        ending_of(relu, mask), Inputs{values_at(rows), inputs},
                        Call{{images, positions, 1}, threads, beside.data ? &beside : nullptr},
                        reinterpret_cast<float*>(out));
        },
        "sizes"_a, "matrix"_a, "channels"_a, "rows"_a, "bias"_a.none(), "relu"_a, "mask"_a.none(),
        "share"_a.none(), "out"_a, "threads"_a);
    m.def(
        "map_outer",
        [](const ProductSizes& sizes, const View& a, const View& x, Address out, int threads) {
            nb::gil_scoped_release unlocked;
            const auto [images, outputs, inputs, positions] = sizes;
            map_outer(view_of(a), view_of(x), outputs, inputs, images, positions,
                      reinterpret_cast<float*>(out), threads);
        },
        "sizes"_a, "a"_a, "x"_a, "out"_a, "threads"_a);
}

#else

void bind_convolutions(nb::module_&) {}

#endif

}  // namespace usf
