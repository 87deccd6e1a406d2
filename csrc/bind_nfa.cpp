#include "bindings.hpp"

namespace usf {

void bind_nfa(nb::module_&) {}

}  // namespace usf
