#include <algorithm>

#include "bindings.hpp"
#include "stage_run.hpp"

#ifdef USF_PRODUCTS
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#endif

namespace usf {

#ifdef USF_PRODUCTS

using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Bias = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Channels = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using State = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
// Arguments of every call are passed as addresses of contiguous tensors: making an array of each would take
// as long as a small flow. A condition's share [images, positions, width] is (address, images, width).
using Shares = std::vector<std::tuple<std::uintptr_t, std::int64_t, int>>;
using Layers = std::vector<Layer>;

std::vector<float> values_of(const std::optional<Bias>& values) {
    if (!values) return {};
    return {values->data(), values->data() + values->shape(0)};
}

Maps maps_of(const Matrix& rows, std::int64_t height, std::int64_t width) {
    const auto count = static_cast<std::int64_t>(rows.shape(0));
    return {count / std::max<std::int64_t>(height * width, 1), height, width};
}

Half channels_of(const Channels& index, const StageRun& run) {
    return Half(index.data(), static_cast<int>(index.shape(0)), run.channels());
}

void bind_stage_run(nb::module_& m) {
    using namespace nb::literals;
    m.attr("MULTIPLIES_PAIRS") = multiplies_pairs();
    m.def("has_amx", has_amx);
    nb::class_<Layer>(m, "Layer")
        .def(
            "__init__",
            [](Layer* self, Matrix weight, Bias bias, bool relu, bool conditioned, int kernel_height,
               int kernel_width, bool pairs) {
                const int outputs = static_cast<int>(weight.shape(0)),
                          inputs = static_cast<int>(weight.shape(1));
                if (bias.shape(0) != weight.shape(0))
                    throw std::invalid_argument("bias: expected a value for each output");
                new (self) Layer(weight.data(), bias.data(), outputs, inputs, relu, conditioned,
                                 kernel_height, kernel_width, pairs);
            },
            "weight"_a.noconvert(), "bias"_a.noconvert(), "relu"_a, "conditioned"_a, "kernel_height"_a,
            "kernel_width"_a, "pairs"_a)
        .def(
            "run",
            [](const Layer& layer, Matrix rows, State out, std::int64_t height, std::int64_t width,
               int threads) {
                if (rows.shape(1) != static_cast<std::size_t>(layer.inputs()) ||
                    out.shape(1) != static_cast<std::size_t>(layer.outputs()) ||
                    rows.shape(0) != out.shape(0))
                    throw std::invalid_argument("rows, out: expected the layer's inputs and outputs");
                if (layer.taps() > 1 && layer.takes_words())
                    throw std::invalid_argument("expected another layer than a convolution of words");
                nb::gil_scoped_release unlocked;
                const Maps maps = maps_of(rows, height, width);
                const Inputs in{rows.data(), static_cast<std::ptrdiff_t>(rows.shape(1))};
                apply(layer, in, Call{maps, threads}, out.data());
            },
            "rows"_a.noconvert(), "out"_a.noconvert(), "height"_a, "width"_a, "threads"_a)
        .def(
            "run_bfloat16",
            [](const Layer& layer, std::uintptr_t rows, std::int64_t count, std::uintptr_t out, int threads) {
                const auto whole = [](int numbers) { return 2 * words_of(numbers) == numbers; };
                if (!layer.takes_words() || layer.taps() > 1 || !whole(layer.weights().inputs()) ||
                    !whole(layer.outputs()))
                    throw std::invalid_argument("expected a linear layer of whole words");
                nb::gil_scoped_release unlocked;
                apply(layer, reinterpret_cast<const BFloat16*>(rows), Call{{1, count, 1}, threads},
                      reinterpret_cast<BFloat16*>(out));
            },
            "rows"_a, "count"_a, "out"_a, "threads"_a);
    nb::class_<StageRun>(m, "StageRun")
        .def(nb::init<int>(), "channels"_a)
        .def(
            "product", [](StageRun& run, const Layer& layer) { run.add(Product{layer.weights()}); },
            "layer"_a)
        .def(
            "exchange",
            [](StageRun& run, const Layer& layer, Channels to) {
                run.add(Exchange{layer.weights(), channels_of(to, run)});
            },
            "layer"_a, "to"_a.noconvert())
        .def(
            "residual",
            [](StageRun& run, const Layers& layers, const Layer& last, float factor) {
                run.add(Residual{{{}, layers}, last.weights(), factor});
            },
            "layers"_a, "last"_a, "factor"_a)
        .def(
            "additive",
            [](StageRun& run, const Layers& layers, Channels passive, std::optional<Bias> passive_shift,
               Channels active, float factor) {
                run.add(Additive{{channels_of(passive, run), layers, values_of(passive_shift)},
                                 channels_of(active, run),
                                 factor});
            },
            "layers"_a, "passive"_a.noconvert(), "passive_shift"_a.noconvert().none(), "active"_a.noconvert(),
            "factor"_a)
        .def(
            "affine",
            [](StageRun& run, const Layers& layers, Channels passive, std::optional<Bias> passive_shift,
               Channels active, Bias shift, float clamp, bool inverse) {
                run.add(Affine{{channels_of(passive, run), layers, values_of(passive_shift)},
                               channels_of(active, run),
                               values_of(shift),
                               clamp,
                               inverse});
            },
            "layers"_a, "passive"_a.noconvert(), "passive_shift"_a.noconvert().none(), "active"_a.noconvert(),
            "shift"_a.noconvert(), "clamp"_a, "inverse"_a)
        .def(
            "reorder",
            [](StageRun& run, Channels index, Bias scale, Bias bias) {
                if (index.shape(0) != static_cast<std::size_t>(run.channels()))
                    throw std::invalid_argument("index: expected a permutation of the channels");
                run.add(Reorder{
                    {index.data(), index.data() + index.shape(0)}, values_of(scale), values_of(bias)});
            },
            "index"_a.noconvert(), "scale"_a.noconvert(), "bias"_a.noconvert())
        .def(
            "shift",
            [](StageRun& run, Bias bias) {
                if (bias.shape(0) != static_cast<std::size_t>(run.channels()))
                    throw std::invalid_argument("bias: expected a value for each channel");
                run.add(Shift{values_of(bias)});
            },
            "bias"_a.noconvert())
        .def(
            "run",
            [](const StageRun& run, std::uintptr_t rows, std::uintptr_t state, bool bfloat16,
               std::int64_t images, std::int64_t height, std::int64_t width, const Shares& shares,
               std::optional<std::uintptr_t> log_det, int threads) {
                std::vector<Condition> conditions;
                for (const auto& [address, count, channels] : shares)
                    conditions.push_back({bfloat16 ? nullptr : reinterpret_cast<const float*>(address), count,
                                          channels,
                                          bfloat16 ? reinterpret_cast<const BFloat16*>(address) : nullptr});
                const auto run_as = [&]<class T>(const T*) {
                    run.run(reinterpret_cast<const T*>(rows), reinterpret_cast<T*>(state),
                            {images, height, width}, conditions,
                            reinterpret_cast<float*>(log_det.value_or(0)), threads);
                };
                nb::gil_scoped_release unlocked;
                if (bfloat16)
                    run_as(static_cast<const BFloat16*>(nullptr));
                else
                    run_as(static_cast<const float*>(nullptr));
            },
            "rows"_a, "state"_a, "bfloat16"_a, "images"_a, "height"_a, "width"_a, "shares"_a,
            "log_det"_a.none(), "threads"_a);
}

#else

void bind_stage_run(nb::module_&) {}

#endif

}  // namespace usf
