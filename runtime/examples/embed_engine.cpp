// Embedding the engine: every line of standard input is a request. Requests join the running batch and leave it when
// they end, whatever their order; their texts are printed as they come, in the order of the lines.
//
//   embed_engine BUNDLE < prompts.txt
//
// http_service.cpp is the same with HTTP around it.

#include <chameleon/engine.h>

#include <deque>
#include <iostream>

namespace {

/// Print the tokens of a request until it has ended.
void print(const chameleon::Stream& stream) {
  while (const auto token = stream.next()) {
    std::cout << token->text << std::flush;
    if (token->generation) std::cout << "  [" << chameleon::to_string(token->generation->finish_reason) << "]\n";
  }
}

void serve(const char* bundle) {
  const chameleon::Runtime runtime(bundle);
  chameleon::Engine engine(runtime, {.rows = 8, .max_waiting = 64});
  const chameleon::Generate generate{.max_new_tokens = 20,
                                     .sampling = chameleon::Sampling{.temperature = 0.8, .top_p = 0.95, .seed = 7}};
  const chameleon::Adapt adapt{.mode = chameleon::Mode::centroid};

  std::deque<chameleon::Stream> streams;
  for (std::string line; std::getline(std::cin, line);) {
    while (true) {
      try {
        streams.push_back(engine.submit(std::span<const std::string>(&line, 1), generate, adapt));  // returns at once
        break;
      } catch (const chameleon::QueueFullError&) {  // finish the oldest request, then there is room
        print(streams.front());
        streams.pop_front();
      } catch (const chameleon::InputError& error) {  // concerns this request alone
        std::cerr << "refused: " << error.what() << " [" << error.code() << "]\n";
        break;
      }
    }
  }
  for (const chameleon::Stream& stream : streams) print(stream);
}  // the engine's destructor waits for its rows and ends its thread

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: embed_engine BUNDLE < prompts.txt\n";
    return 2;
  }
  try {
    serve(argv[1]);
    return 0;
  } catch (const chameleon::Error& error) {
    std::cerr << "error: " << error.what() << " [" << error.code() << "]\n";
    return 2;
  }
}
