"""The files beside an exported graph: a C++ program that runs it, its header, and its CMake file."""

from __future__ import annotations

from collections.abc import Sequence

from ..specs import ModelSpec

# The C++ libraries for tokenizer.model and tokenizer.json.
SENTENCEPIECE, TOKENIZERS = "sentencepiece", "tokenizers"

PROGRAM = """\
// Generates text with an exported model: ./generate COUNT "a text", or COUNT TOKEN TOKEN ... without a tokenizer.
// Greedy: the likeliest token each time. model.h has the model's numbers, model.mlxfn its weights and its steps.
#include <algorithm>
#include <iostream>
#include <string>
#include <vector>
#include "mlx/mlx.h"
#include "model.h"
#ifdef WITH_TOKENIZER
#include "tokenizer.h"
#endif
namespace mx = mlx::core;

// Runs the model on new tokens, in the largest traced lengths, and returns the most likely next token.
struct Runner {
  mx::ImportedFunction step = mx::import_function(std::string(FOLDER) + "/model.mlxfn");
  std::vector<mx::array> caches;
  int offset = 0, places = 0;

  explicit Runner(int wanted) {
    for (int each : kPlaces) places = places == 0 && each >= wanted ? each : places;
    if (places == 0) throw std::runtime_error("prompt and answer have more tokens than this export has places for");
    for (const auto& layer : kLayers)
      for (int part = 0; part < 2; part++) caches.push_back(mx::zeros({1, layer.heads, places, layer.size}, kType));
  }
  int operator()(const std::vector<int>& tokens) {
    mx::array logits(0.0f);
    for (size_t done = 0; done < tokens.size();) {
      int length = 1;
      for (int each : kLengths) length = each <= int(tokens.size() - done) ? std::max(length, each) : length;
      std::vector<mx::array> inputs = {mx::array(tokens.data() + done, {1, length}, mx::int32), mx::array(offset)};
      for (auto& cache : caches) inputs.push_back(std::move(cache));
      caches.clear();  // no other reference to the old caches: the new ones reuse their memory
      auto outputs = step(inputs);
      inputs.clear();
      mx::eval(outputs);
      logits = outputs[0];
      caches.assign(outputs.begin() + 1, outputs.end());
      done += length, offset += length;
    }
    return mx::argmax(logits).item<uint32_t>();
  }
};

int number(const std::string& word, int most) {
  const bool digits = !word.empty() && word.size() < 10 && word.find_first_not_of("0123456789") == std::string::npos;
  if (digits && std::stoi(word) <= most) return std::stoi(word);
  throw std::runtime_error(word + " is not a whole number from 0 to " + std::to_string(most));
}

int main(int count, char** words) try {
  if (count < 3) throw std::runtime_error("usage: generate COUNT TEXT, or generate COUNT TOKEN ...");
  const int wanted = number(words[1], 1 << 20);
  std::vector<int> prompt;
#ifdef WITH_TOKENIZER
  Tokenizer tokenizer(FOLDER);
  prompt = tokenizer.encode(words[2]);
  if (kBos >= 0) prompt.insert(prompt.begin(), kBos);
#else
  for (int i = 2; i < count; i++) prompt.push_back(number(words[i], kTokens - 1));
#endif
  if (prompt.empty()) throw std::runtime_error("the prompt is empty");
  Runner run(int(prompt.size()) + wanted);
  std::vector<int> answer;
  for (int token = run(prompt); int(answer.size()) < wanted; token = run({token})) {
    if (std::find(kStops.begin(), kStops.end(), token) != kStops.end()) break;
    answer.push_back(token);
    if (int(answer.size()) == wanted) break;
  }
#ifdef WITH_TOKENIZER
  std::cout << tokenizer.decode(answer) << std::endl;
#else
  for (int token : answer) std::cout << token << ' ';
  std::cout << std::endl;
#endif
} catch (const std::exception& error) {
  std::cerr << "generate: " << error.what() << std::endl;
  return 2;
}
"""

_TOKENIZER_HEADERS = {
    SENTENCEPIECE: """\
// The tokenizer by Google's library sentencepiece (Debian: libsentencepiece-dev, Homebrew: sentencepiece).
#pragma once
#include <sentencepiece_processor.h>
#include <stdexcept>
#include <string>
#include <vector>
struct Tokenizer {
  sentencepiece::SentencePieceProcessor model;
  explicit Tokenizer(const std::string& folder) {
    if (!model.Load(folder + "/tokenizer.model").ok()) throw std::runtime_error("tokenizer.model cannot be read");
  }
  std::vector<int> encode(const std::string& text) { return model.EncodeAsIds(text); }
  std::string decode(const std::vector<int>& tokens) { return model.DecodeIds(tokens); }
};
""",
    TOKENIZERS: """\
// The tokenizer by mlc-ai/tokenizers-cpp, which wraps Hugging Face's library; CMake fetches it, and it needs Rust.
#pragma once
#include <tokenizers_cpp.h>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>
struct Tokenizer {
  std::unique_ptr<tokenizers::Tokenizer> model;
  explicit Tokenizer(const std::string& folder) {
    std::ifstream file(folder + "/tokenizer.json", std::ios::binary);
    if (!file) throw std::runtime_error("tokenizer.json cannot be read");
    model = tokenizers::Tokenizer::FromBlobJSON(std::string(std::istreambuf_iterator<char>(file), {}));
  }
  std::vector<int> encode(const std::string& text) { return model->Encode(text); }
  std::string decode(const std::vector<int>& tokens) { return model->Decode(tokens); }
};
""",
}

_BUILD = """\
# cmake -B build -DMLX_ROOT="$(python -m mlx --cmake-dir)" && cmake --build build && build/generate 32 "What is a banjo?"
cmake_minimum_required(VERSION 3.25)
project(generate CXX)
set(CMAKE_CXX_STANDARD 20)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()
find_package(MLX CONFIG REQUIRED)
add_executable(generate generate.cpp)
target_compile_definitions(generate PRIVATE FOLDER="${CMAKE_CURRENT_SOURCE_DIR}")
target_include_directories(generate PRIVATE ${MLX_INCLUDE_DIRS})
target_link_libraries(generate PRIVATE mlx)
# On Linux the wheel has the libraries that MLX needs in a folder beside it.
get_target_property(mlx_library mlx IMPORTED_LOCATION)
if(NOT mlx_library)
  get_target_property(mlx_library mlx IMPORTED_LOCATION_RELEASE)
endif()
cmake_path(GET mlx_library PARENT_PATH mlx_folder)
file(GLOB mlx_needs LIST_DIRECTORIES true "${mlx_folder}/../../mlx*.libs")
if(mlx_needs AND NOT APPLE)
  target_link_options(generate PRIVATE "-Wl,-rpath-link,${mlx_needs}")
endif()
"""

_BUILD_TOKENIZER = {
    SENTENCEPIECE: """
option(WITH_TOKENIZER "text in and out, where sentencepiece is found; without it token numbers" ON)
find_path(SENTENCEPIECE_INCLUDE sentencepiece_processor.h)
find_library(SENTENCEPIECE_LIBRARY sentencepiece)
if(WITH_TOKENIZER AND SENTENCEPIECE_INCLUDE AND SENTENCEPIECE_LIBRARY)
  target_compile_definitions(generate PRIVATE WITH_TOKENIZER)
  target_include_directories(generate PRIVATE ${SENTENCEPIECE_INCLUDE})
  target_link_libraries(generate PRIVATE ${SENTENCEPIECE_LIBRARY})
else()
  message(STATUS "without sentencepiece: the program takes and gives token numbers")
endif()
""",
    TOKENIZERS: """
option(WITH_TOKENIZER "fetch mlc-ai/tokenizers-cpp (needs git and Rust); without it the program takes token numbers" OFF)
if(WITH_TOKENIZER)
  include(FetchContent)
  FetchContent_Declare(tokenizers_cpp GIT_REPOSITORY https://github.com/mlc-ai/tokenizers-cpp GIT_TAG main)
  FetchContent_MakeAvailable(tokenizers_cpp)
  target_compile_definitions(generate PRIVATE WITH_TOKENIZER)
  target_link_libraries(generate PRIVATE tokenizers_cpp)
endif()
""",
}


def program_files(
    spec: ModelSpec,
    dtype: str,
    places: Sequence[int],
    lengths: Sequence[int],
    bos: int | None,
    stops: Sequence[int],
    tokenizer: str | None,
) -> dict[str, str]:
    """Name -> text of the program, its header with the model's dimensions, and its CMake file.

    tokenizer: SENTENCEPIECE, TOKENIZERS, or None where there is none.
    """
    layers = ", ".join(f"{{{layer.num_kv_heads}, {layer.head_dim}}}" for layer in spec.layers)
    header = f"""\
// The numbers of this export, for generate.cpp; model.json has the same and more.
#pragma once
#include <vector>
#include "mlx/mlx.h"
struct Layer {{
  int heads, size;
}};
inline const std::vector<Layer> kLayers = {{{layers}}};
inline const std::vector<int> kPlaces = {{{", ".join(map(str, sorted(places)))}}};
inline const std::vector<int> kLengths = {{{", ".join(map(str, sorted(lengths)))}}};
inline const std::vector<int> kStops = {{{", ".join(map(str, stops))}}};
inline const int kTokens = {spec.vocab_size};
inline const int kBos = {-1 if bos is None else bos};
inline const mlx::core::Dtype kType = mlx::core::{dtype};
"""
    files = {"generate.cpp": PROGRAM, "model.h": header, "CMakeLists.txt": _BUILD}
    if tokenizer is not None:
        files["tokenizer.h"] = _TOKENIZER_HEADERS[tokenizer]
        files["CMakeLists.txt"] += _BUILD_TOKENIZER[tokenizer]
    return files
