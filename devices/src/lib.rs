//! Device models that know nothing of PCI or KVM: bus, guest memory views, gate, virtio core, net, block, rng, console.
