#include <chameleon/runtime.h>

#include <iostream>

int main(int argc, char** argv) {
  try {
    const chameleon::Runtime runtime(argc > 1 ? argv[1] : "");
    const std::vector<std::string> prompts = {"The river"};
    for (const auto& generation : runtime.generate(prompts)) std::cout << generation.text << '\n';
    (void)runtime.score(std::vector<std::string>{"\xff"});
    return 1;
  } catch (const chameleon::InputError& error) {  // thrown in the library, caught here by its own type
    return std::string(error.code()) == "input_invalid" ? 0 : 1;
  }
}
