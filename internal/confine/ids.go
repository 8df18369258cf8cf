package confine

import (
	"bufio"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"io"
	"os"
)

// Programs that root confines get ids from lowestID, which lie above those that gVisor's
// machines get and above what is given to users, services and containers. Which one is
// taken is left to chance, so that a program that broke out finds no other under its id.
const (
	lowestID = 0x7ffe0000
	idCount  = 0x1ffff
)

// ID returns an id of the host for a program that root confines.
func ID() (uint32, error) {
	mapped, err := os.Open("/proc/self/uid_map")
	if err != nil {
		return 0, err
	}
	defer mapped.Close()
	if !idsMapped(mapped) {
		return 0, fmt.Errorf("this root does not own the user ids from %d on: run as an ordinary user, or in a container that maps all ids", lowestID)
	}
	var random [4]byte
	rand.Read(random[:])
	return lowestID + binary.LittleEndian.Uint32(random[:])%idCount, nil
}

func idsMapped(uidMap io.Reader) bool {
	lines := bufio.NewScanner(uidMap)
	for lines.Scan() {
		var first, outside, size uint64
		if _, err := fmt.Sscan(lines.Text(), &first, &outside, &size); err == nil && first <= lowestID && first+size >= lowestID+idCount {
			return true
		}
	}
	return false
}

// SubID returns one for a program that a person with subordinate ids confines.
func SubID(count uint32) uint32 {
	var random [4]byte
	rand.Read(random[:])
	return 1 + binary.LittleEndian.Uint32(random[:])%count
}
