// The Python module fastmim._C: registers the operators of _ops.so and says how it was built.
//
// It links neither torch nor libpython, and the operators know no Python: one _ops.so serves all.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <dlfcn.h>

#include <optional>
#include <string>
#include <vector>

#include "build_info.h"  // written by CMake
#include "simd.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["git_revision"] = FASTMIM_GIT_REVISION;
  info["compiler"] = FASTMIM_COMPILER;
  info["cuda"] = *FASTMIM_CUDA_VERSION ? py::object(py::str(FASTMIM_CUDA_VERSION)) : py::none();
  info["cuda_architectures"] = py::str(FASTMIM_CUDA_ARCHITECTURES).attr("split")();
  info["torch_build"] = FASTMIM_TORCH_BUILD;
  info["torch_target"] = FASTMIM_TORCH_TARGET;
  info["sanitize"] = bool(FASTMIM_SANITIZE);
  info["simd_variants"] = std::vector<std::string>(std::begin(fastmim::SIMD_VARIANTS),
                                                   std::end(fastmim::SIMD_VARIANTS));
  info["simd_in_use"] = fastmim::SIMD_VARIANTS[fastmim::simd_variant()];
  return info;
}

// _ops.so beside this file. Python has not set __file__ yet while the module initialises.
std::string operator_library() {
  Dl_info here{};
  dladdr(reinterpret_cast<const void*>(&build_info), &here);
  const std::string file = here.dli_fname;
  return file.substr(0, file.rfind('/') + 1) + "_ops.so";
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Operators of fastmim in C++ and CUDA, registered as torch.ops.fastmim_native on import.";
  m.def("build_info", &build_info,
        "How this library was built: a dict of strings and lists of strings.");

  const py::module_ torch = py::module_::import("torch");
  try {
    torch.attr("ops").attr("load_library")(operator_library());
  } catch (py::error_already_set& error) {
    const std::string message = "fastmim._C: " + operator_library() +
                                " does not load under torch " +
                                py::str(torch.attr("__version__")).cast<std::string>() +
                                "; it needs torch " FASTMIM_TORCH_TARGET " or later";
    py::raise_from(error, PyExc_ImportError, message.c_str());
    throw py::error_already_set();
  }
}
