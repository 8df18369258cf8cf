package microvm

import "testing"

func TestLastWords(t *testing.T) {
	const pci = "[    0.091] PCI: Fatal: No config space access function found\r\n"
	for console, want := range map[string]string{
		"": "", pci: "", pci + "\n \n": "",
		pci + "cal: no port\n[22.2] reboot: Restarting system\n[22.2] reboot: machine restart\n": "cal: no port",
		"Kernel panic\n" + pci:               "Kernel panic",
		pci + "init: /usr is no directory\n": "init: /usr is no directory",
	} {
		if got := LastWords(console); got != want {
			t.Errorf("%q: %q, want %q", console, got, want)
		}
	}
}
