package main

// How a machine with a kernel of its own is greeted: it has random numbers that no other has before anything
// hears of it, and the first wire is the first.
var bootMutants = []mutant{
	{"greeting: each has entropy of its own", "wire/greeting.go", "\trand.Read(g.Entropy[:])\n", "", "TestGreeting"},
	{"greeting: what the guest owes comes before ok", "wire/greeting.go",
		"\t\tif err := welcome(g); err != nil {\n\t\t\treturn g, errors.Join(err, SayRefusal(conn, g.Nonce, err.Error()))\n\t\t}\n\t\tif _, err := fmt.Fprintf(conn, \"\\n%s%s ok\\n\", greetingWord, g.Nonce); err != nil {\n\t\t\treturn g, err\n\t\t}\n",
		"\t\tif _, err := fmt.Fprintf(conn, \"\\n%s%s ok\\n\", greetingWord, g.Nonce); err != nil {\n\t\t\treturn g, err\n\t\t}\n\t\tif err := welcome(g); err != nil {\n\t\t\treturn g, errors.Join(err, SayRefusal(conn, g.Nonce, err.Error()))\n\t\t}\n",
		"TestWelcomeBeforeOK"},
	{"greeting: it is over when the wire is taken", "wire/greeting.go", "\tif err := hear(conn, mine, \"taken\"); err != nil {\n\t\treturn nil, err\n\t}\n", "", "TestGreetingInOrder"},
	{"greeting: a guest that was told to go has time", "wire/greeting.go", "late.After(deadline)", "false", "TestGreetingTakenLate"},
	{"boot: entropy is added before ok", "guest/boot/boot.go", "\tif err := f.random(g.Entropy[:]); err != nil {\n\t\treturn err\n\t}\n", "", "TestEntropyBeforeOK"},
	{"boot: entropy counts", "guest/boot/kernel.go", "uint32(len(entropy)*8)", "uint32(0)", "TestEntropyBeforeOK"},
	{"boot: random numbers begin anew", "guest/boot/kernel.go", "pool.Fd(), unix.RNDRESEEDCRNG, 0)", "pool.Fd(), unix.RNDGETENTCNT, uintptr(unsafe.Pointer(new(int32))))", "TestEntropyBeforeOK"},
	{"boot: the first wire is the first", "guest/boot/boot.go", "\tif f.init == \"\" {", "\tif true {", "TestFirstWire"},
	{"boot: both ports are waited for", "guest/boot/wires.go", "len(devices) == len(portNames), nil", "len(devices) > 0, nil", "TestFindPorts"},
}
