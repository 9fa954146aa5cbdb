from meshloom.cli import main

main()
