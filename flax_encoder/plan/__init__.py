"""What a run will take, known before hardware is rented: the step compiled for chips that are not there."""
