// Runs schedules of requests: `chameleon_schedules BUNDLE`, with one schedule on each line of standard input. Prints
// one result on each line. tests/cpp/test_engine.py compares them with Python's.

#include <iostream>

#include "schedules.h"

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: chameleon_schedules BUNDLE\n";
    return 2;
  }
  const chameleon::Runtime runtime(argv[1]);
  for (std::string line; std::getline(std::cin, line);) {
    std::cout << chameleon::test::run_schedule(runtime, chameleon::test::Json::parse(line)).dump() << std::endl;
  }
  return 0;
}
